"""What a network is worth and what it costs: accuracy, predictions, robustness, parameters, speed."""
