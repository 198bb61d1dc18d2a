"""What a network is worth and what it costs: accuracy on labelled images, predictions, parameters, multiply-adds."""
