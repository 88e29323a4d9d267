"""`inductor-moe bench`: layers of real models, timed against other ways to run them."""
