"""Make a mixture-of-experts model smaller."""
