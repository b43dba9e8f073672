"""These tests train."""
