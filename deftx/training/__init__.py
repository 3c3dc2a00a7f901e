"""Lightning modules and the callback that run the two phases around the core."""
