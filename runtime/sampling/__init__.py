"""The sampling loop, with the scheduler's step fused where it is linear."""
