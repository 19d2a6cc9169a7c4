"""What adapters, policies, importers and passes are made of, and what they may see."""
