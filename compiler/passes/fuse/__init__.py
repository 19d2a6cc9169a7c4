"""Over what a row is left with: what nothing needs goes, chains become fused operations, and each gets a provider."""
