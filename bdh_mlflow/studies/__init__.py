"""Several trainings together: compared, searched over, or proved equal."""
