"""What is in the dataset, what we name, what we write. Knows nothing of torch."""
