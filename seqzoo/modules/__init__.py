"""Pieces that several layers share."""
