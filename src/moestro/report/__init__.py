"""Pages that show what was done to a model: one self-contained HTML file each, readable without a network."""

from moestro.report.fit_page import fit_page, write_fit_page
from moestro.report.train_page import train_page, write_train_page

__all__ = ["fit_page", "train_page", "write_fit_page", "write_train_page"]
