"""Using a trained model: load it, evaluate it, generate text, export it to a file, register it for serving."""
