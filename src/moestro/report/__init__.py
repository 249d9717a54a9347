"""Pages that show what was done to a model: one self-contained HTML file each, readable without a network."""

from moestro.report.fit_page import fit_page, write_fit_page

__all__ = ["fit_page", "write_fit_page"]
