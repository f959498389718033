"""Tests of jbn, a file a property."""
