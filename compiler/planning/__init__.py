"""What making plans needs: services for policies, published plans, sweeps' results."""
