"""Gradients of the products on the channel axis, and the moments that training needs beside them."""
