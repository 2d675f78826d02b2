"""The digital brain: a raw BIDS dataset with known truth. Nothing is imported on the way in."""
