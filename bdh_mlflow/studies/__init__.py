"""Several trainings together: compared with each other, searched for the best settings, or proved equal."""
