"""Evaluates a model: samples, features, metrics, and a result file that records what was measured."""
