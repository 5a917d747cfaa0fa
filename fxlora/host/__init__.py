"""What an adapter does to a model beside branches: modules trained whole, biases, replicated layers."""
