"""Test classes that an extension of this package passes. They need pytest; nothing else in the package imports them."""
