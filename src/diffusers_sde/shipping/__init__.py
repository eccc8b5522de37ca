"""What travels with a saved model: the package's own code in one file, versions, cards, uploads."""
