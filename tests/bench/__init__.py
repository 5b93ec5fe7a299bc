"""`make bench`: this package's methods and other implementations on the same network and images."""
