"""Addresses, credentials and bounded HTTP requests."""
