// Steps of the sparse products that AVX2 and AVX-512 share. Included inside a level's namespace.

// target[c * target_pitch + r] = source[r * source_pitch + c] for 8 rows and 8 columns.
inline void transpose_eight(const float* source, int64_t source_pitch, float* target,
                            int64_t target_pitch) {
  __m256 row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(source + i * source_pitch);
  for (int i = 0; i < 8; i += 2) {  // columns 0 1 4 5 and 2 3 6 7 of two rows
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // column j and j + 4 of four rows
    four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(target + i * target_pitch,
                     _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
    _mm256_storeu_ps(target + (i + 4) * target_pitch,
                     _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
  }
}
