"""Mixture of experts: routing, routers, losses, experts, layer; metrics and devices are read off a routing."""
