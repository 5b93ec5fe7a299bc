"""`make bench`: this kit's methods and those of others, measured on the same network and images."""
