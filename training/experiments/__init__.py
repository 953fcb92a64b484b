"""The programs that made the published pages."""
