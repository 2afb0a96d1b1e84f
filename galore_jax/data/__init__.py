"""Token batches for language-model training: C4, and an offline sample of real English."""
