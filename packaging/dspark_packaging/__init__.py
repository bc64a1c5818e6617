"""Packaging of a DSpark drafter for the Hugging Face Hub.

A packaged drafter is one flat folder: weights, configuration, the JSON files that say where
they came from and what was measured, and a card and checksums generated from those.
"""
