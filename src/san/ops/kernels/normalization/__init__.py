"""BatchNorm on vectors of its channels: from moments to scale and shift, and back."""
