"""Pages that show what was done to a model: one self-contained HTML file each, readable without a network."""

from moestro.report.fit_page import fit_page, write_fit_page
from moestro.report.look_page import look_page, write_look_page
from moestro.report.train_page import train_page, write_train_page

__all__ = ["fit_page", "look_page", "train_page", "write_fit_page", "write_look_page", "write_train_page"]
