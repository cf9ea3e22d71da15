"""The domains that card scores refer to, each with sentences typical of it."""

from __future__ import annotations

DOMAINS: dict[str, tuple[str, ...]] = {
    "general": (
        "What is the capital of France?",
        "Give me three tips for sleeping better.",
        "Who are you and what can you do?",
        "Recommend a good present for a friend.",
        "What is the weather usually like in spring?",
    ),
    "mathematics": (
        "Solve the equation 2x + 3 = 11 for x.",
        "A train travels 60 miles in 1.5 hours. What is its average speed?",
        "Prove that the square root of 2 is irrational.",
        "If she buys 3 apples for $2 each and pays with $10, how much change does she get?",
        "Compute the derivative of x^2 sin(x).",
    ),
    "code": (
        "Write a Python function that reverses a linked list.",
        "Why does this JavaScript code throw a TypeError?",
        "Explain what this SQL query does.",
        "Fix the bug in my C++ program.",
        "How do I sort a dictionary by value in Python?",
    ),
    "science": (
        "Why is the sky blue?",
        "How does photosynthesis work?",
        "What is the difference between a nucleus and an electron?",
        "Explain Newton's second law of motion.",
        "Which gas is released when zinc reacts with acid?",
    ),
    "medicine": (
        "What are the symptoms of diabetes?",
        "A patient has fever and a stiff neck. What is the likely diagnosis?",
        "How does ibuprofen reduce pain?",
        "Which vitamin deficiency causes scurvy?",
    ),
    "law": (
        "What is the statute of limitations for breach of contract?",
        "Can a landlord evict a tenant without notice?",
        "Explain the difference between civil and criminal law.",
        "The defendant was charged with burglary. Is the evidence admissible?",
    ),
    "business": (
        "How do I calculate the return on an investment?",
        "What is the difference between marketing and sales?",
        "Write a business plan for a coffee shop.",
        "What happens to prices when demand falls and supply is constant?",
    ),
    "history": (
        "When did the Second World War end?",
        "Who was the first emperor of Rome?",
        "What caused the French Revolution?",
        "Describe the daily life of people in ancient Egypt.",
    ),
    "writing": (
        "Write a short poem about autumn.",
        "Rewrite this paragraph to sound more formal.",
        "Summarise the following article in two sentences.",
        "Write a polite e-mail to decline an invitation.",
        "Tell me a story about a dragon who is afraid of fire.",
    ),
    "translation": (
        "Translate this sentence into French.",
        "How do you say good morning in Japanese?",
        "What does the German word Fernweh mean in English?",
        "Übersetze den folgenden Text ins Englische.",
    ),
}
