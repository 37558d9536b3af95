"""Documents of pretraining: found, read, tokenised, masked, packed, and gone on with exactly after a stop."""
