"""Training data: text prepared as parquet files, indexed, split, and read in an order that depends on the seed alone."""
