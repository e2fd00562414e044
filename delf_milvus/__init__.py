"""Find the photos that show the same thing, with proof: DELF local features on Milvus."""
