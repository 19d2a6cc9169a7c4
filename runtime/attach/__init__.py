"""Running an executable inside a diffusers pipeline."""
