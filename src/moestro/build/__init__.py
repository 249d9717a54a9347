"""Dense models turned into mixtures of experts."""
