"""Where stored values lie: slots by liveness, and their places in one arena."""
