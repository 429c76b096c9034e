"""Buckets as earlier versions wrote them, which every later one reads."""
