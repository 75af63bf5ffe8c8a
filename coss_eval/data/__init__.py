"""A name, a folder or parquet files to uint8 batches of one geometry. Empty, so that importing it stays quick."""
