"""Checks: does a bundle compute what it should, and how well does an expert do?"""
