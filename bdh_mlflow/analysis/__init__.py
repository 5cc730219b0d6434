"""What a trained network does: its activity, its graph of neurons, its synapses. Knows models, not where they come from or go to."""
