"""Photographs, and flowers that are drawn, into batches."""
