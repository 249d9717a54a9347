"""A local page to look at experts and heads while a model writes, and to switch them."""
