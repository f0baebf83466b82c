"""From any image-caption data set to clean training Parquet, with summaries."""
