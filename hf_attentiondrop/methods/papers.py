"""BibTeX entries of the papers that several methods come from."""

ATTENTION_DROP = """@article{baig2025attentiondrop,
  title   = {AttentionDrop: A Novel Regularization Method for Transformer Models},
  author  = {Baig, Mirza Samad Ahmed and Gillani, Syeda Anshrah and Khan, Abdul Akbar and Shah, Shahid Munir and \
Khan, Muhammad Omer},
  journal = {arXiv preprint arXiv:2504.12088},
  year    = {2025}
}"""

AFFINE_SCALED = """@article{bae2026affine,
  title   = {Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention},
  author  = {Bae, Jeongin and Park, Baeseong and Park, Gunho and Kim, Minsub and Lee, Joonhyung and Yoo, Junhee and \
Woo, Sunghyeon and Ryu, Jiwon and Kwon, Se Jung and Lee, Dongsoo},
  journal = {arXiv preprint arXiv:2602.23057},
  year    = {2026}
}"""
