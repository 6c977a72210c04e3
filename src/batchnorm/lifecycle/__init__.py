"""What is done with the layers beside training them."""
