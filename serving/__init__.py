"""The Ray Serve application: embeddings, search and the web page of a Long-CLIP model."""
