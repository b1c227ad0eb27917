// The operations of a forward pass on every backend, against the same in double.
#include "kernels/network.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "tests/kernels/under_test.h"

namespace pewter::kernels {
namespace {

// Row-major, on the host; rows are `padding` further apart in the backend's memory.
struct Dense {
  int64_t rows = 0, columns = 0;
  std::vector<double> values;

  Dense(int64_t r, int64_t c) : rows(r), columns(c), values(r * c) {}
  double& operator()(int64_t i, int64_t j) { return values[i * columns + j]; }
  double operator()(int64_t i, int64_t j) const { return values[i * columns + j]; }
};

// Values that are floats.
Dense Random(int64_t rows, int64_t columns, int seed, double scale = 1) {
  Dense m(rows, columns);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(0, scale);
  for (double& value : m.values) value = static_cast<float>(normal(engine));
  return m;
}

template <class T>
std::vector<std::byte> Pack(const std::vector<T>& values) {
  const auto* const begin = reinterpret_cast<const std::byte*>(values.data());
  return {begin, begin + values.size() * sizeof(T)};
}

template <class T>
std::vector<T> Unpack(const std::vector<std::byte>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

double LargestError(const Dense& a, const Dense& wanted) {
  EXPECT_EQ(a.rows, wanted.rows);
  EXPECT_EQ(a.columns, wanted.columns);
  double error = 0, largest = 1e-30;
  for (size_t i = 0; i < wanted.values.size(); ++i) {
    error = std::max(error, std::abs(a.values[i] - wanted.values[i]));
    largest = std::max(largest, std::abs(wanted.values[i]));
  }
  return error / largest;
}

class NetworkTest : public BackendTest {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    auto network = backend().network();
    ASSERT_TRUE(network.ok()) << network.status();
    network_ = *network;
  }
  Network& network() { return *network_; }

  // A float matrix in the backend's memory, with guards between its rows.
  class OnDevice {
   public:
    OnDevice(Backend& backend, const Dense& m, int64_t padding = 3)
        : rows_(m.rows), columns_(m.columns), stride_(m.columns + padding) {
      std::vector<float> host(rows_ * stride_, kGuard);
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < columns_; ++j) {
          host[i * stride_ + j] = static_cast<float>(m(i, j));
        }
      }
      bytes_ = std::make_unique<DeviceBytes>(backend, Pack(host));
    }
    Floats view() { return {data(), rows_, columns_, stride_}; }
    float* data() { return reinterpret_cast<float*>(bytes_->data()); }
    Dense Fetch() {
      const std::vector<float> host = Unpack<float>(bytes_->Fetch());
      Dense m(rows_, columns_);
      for (int64_t i = 0; i < rows_; ++i) {
        for (int64_t j = 0; j < stride_; ++j) {
          const float value = host[i * stride_ + j];
          if (j < columns_) {
            m(i, j) = value;
          } else {
            EXPECT_EQ(value, kGuard) << "beside row " << i;
          }
        }
      }
      return m;
    }

   private:
    static constexpr float kGuard = 12345;
    const int64_t rows_, columns_, stride_;
    std::unique_ptr<DeviceBytes> bytes_;
  };
  template <class T>
  std::vector<T> FetchValues(DeviceBytes& bytes) {
    return Unpack<T>(bytes.Fetch());
  }

 private:
  Network* network_ = nullptr;
};
INSTANTIATE_ON_BACKENDS(NetworkTest);

double Reference(Activation f, double x) {
  switch (f) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kTanh:
      return std::tanh(x);
  }
  return 0;
}
constexpr Activation kActivations[] = {
    Activation::kNone, Activation::kGelu, Activation::kGeluTanh, Activation::kQuickGelu,
    Activation::kRelu, Activation::kSilu, Activation::kTanh};

TEST_P(NetworkTest, ActivationsAreExactEverywhere) {
  // From tails to the smallest numbers, through a gate of ones.
  std::vector<double> points = {0, 1e-30, 1e-8, 1e-4, 0.01, 0.3, 0.35, 0.7, 1,
                                2, 3,     5,    7,    9,    12,  40,   90,  200};
  Dense x(2, static_cast<int64_t>(points.size()));
  for (int64_t j = 0; j < x.columns; ++j) {
    x(0, j) = static_cast<float>(points[j]);
    x(1, j) = -x(0, j);
  }
  Dense ones(2, x.columns);
  std::fill(ones.values.begin(), ones.values.end(), 1.0);
  for (const Activation f : kActivations) {
    OnDevice gate(backend(), x), up(backend(), ones);
    ASSERT_TRUE(network().Gate(f, up.view(), gate.view()).ok());
    const Dense result = gate.Fetch();
    for (size_t i = 0; i < x.values.size(); ++i) {
      const double wanted = Reference(f, x.values[i]);
      // Relative, but for results far below what a sum would notice.
      EXPECT_NEAR(result.values[i], wanted, 1e-6 * std::abs(wanted) + 1e-13)
          << static_cast<int>(f) << " of " << x.values[i];
    }
  }
}

TEST_P(NetworkTest, LinearLayers) {
  struct Case {
    int64_t rows, inputs, outputs;
  };
  int seed = 1;
  for (const Case c : {Case{1, 1, 1}, {3, 17, 31}, {33, 64, 257}, {600, 40, 1100}, {0, 4, 4}}) {
    for (const bool transpose : {true, false}) {
      for (const Activation f : {Activation::kNone, Activation::kGelu}) {
        for (const bool add : {false, true}) {
          if (add && f != Activation::kNone) continue;
          const Dense x = Random(c.rows, c.inputs, ++seed), w = Random(c.outputs, c.inputs, ++seed);
          const Dense bias = Random(1, c.outputs, ++seed),
                      before = Random(c.rows, c.outputs, ++seed);
          Dense stored = w;
          if (!transpose) {
            stored = Dense(c.inputs, c.outputs);
            for (int64_t i = 0; i < c.outputs; ++i) {
              for (int64_t j = 0; j < c.inputs; ++j) stored(j, i) = w(i, j);
            }
          }
          OnDevice dx(backend(), x), dw(backend(), stored), db(backend(), bias),
              dy(backend(), before);
          ASSERT_TRUE(network()
                          .Linear({.x = dx.view(),
                                   .transpose_w = Transpose{transpose},
                                   .w = dw.view(),
                                   .bias = db.data(),
                                   .activation = f,
                                   .add = add,
                                   .y = dy.view()})
                          .ok());
          Dense wanted = before;
          for (int64_t i = 0; i < c.rows; ++i) {
            for (int64_t j = 0; j < c.outputs; ++j) {
              double sum = bias(0, j) + (add ? before(i, j) : 0);
              for (int64_t k = 0; k < c.inputs; ++k) sum += x(i, k) * w(j, k);
              wanted(i, j) = Reference(f, sum);
            }
          }
          EXPECT_LT(LargestError(dy.Fetch(), wanted), 2e-6) << c.rows << " " << c.outputs;
        }
      }
    }
  }
}

TEST_P(NetworkTest, Norms) {
  for (const int64_t columns : {1, 8, 31, 33, 768}) {
    for (const bool centre : {true, false}) {
      const Dense x = Random(5, columns, 7, 3), weight = Random(1, columns, 8),
                  bias = Random(1, columns, 9);
      OnDevice dx(backend(), x), dw(backend(), weight), db(backend(), bias);
      OnDevice dy(backend(), Dense(5, columns));
      ASSERT_TRUE(network()
                      .Normalize({.centre = centre,
                                  .epsilon = 1e-5f,
                                  .x = dx.view(),
                                  .weight = dw.data(),
                                  .bias = centre ? db.data() : nullptr,
                                  .y = dy.view()})
                      .ok());
      Dense wanted(5, columns);
      for (int64_t i = 0; i < 5; ++i) {
        double mean = 0, square = 0;
        for (int64_t j = 0; j < columns; ++j) mean += centre ? x(i, j) / columns : 0;
        for (int64_t j = 0; j < columns; ++j) square += std::pow(x(i, j) - mean, 2) / columns;
        for (int64_t j = 0; j < columns; ++j) {
          wanted(i, j) = (x(i, j) - mean) / std::sqrt(square + 1e-5f) * weight(0, j) +
                         (centre ? bias(0, j) : 0);
        }
      }
      EXPECT_LT(LargestError(dy.Fetch(), wanted), 2e-6) << columns;
    }
  }
}

TEST_P(NetworkTest, RotaryPositions) {
  const int64_t rows = 6, heads = 3, head = 10, pairs = 4;  // two columns of a head stay
  const Dense x = Random(rows, heads * head, 11), angles = Random(9, pairs, 12);
  const std::vector<int32_t> positions = {0, 8, 3, 3, 1, 7};
  Dense cos = angles, sin = angles;
  for (double& value : cos.values) value = static_cast<float>(std::cos(value));
  for (double& value : sin.values) value = static_cast<float>(std::sin(value));
  OnDevice dx(backend(), x), dcos(backend(), cos, 0), dsin(backend(), sin, 0);
  DeviceBytes at(backend(), Pack(positions));
  ASSERT_TRUE(network()
                  .Rotate({.x = dx.view(),
                           .head = head,
                           .pairs = pairs,
                           .positions = reinterpret_cast<const int32_t*>(at.data()),
                           .cos = dcos.data(),
                           .sin = dsin.data()})
                  .ok());
  Dense wanted = x;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t p = 0; p < pairs; ++p) {
        const int64_t low = h * head + p, high = low + pairs;
        const double c = cos(positions[i], p), s = sin(positions[i], p);
        wanted(i, low) = x(i, low) * c - x(i, high) * s;
        wanted(i, high) = x(i, high) * c + x(i, low) * s;
      }
    }
  }
  EXPECT_LT(LargestError(dx.Fetch(), wanted), 1e-6);
}

TEST_P(NetworkTest, Attention) {
  struct Case {
    int64_t heads, key_heads, head;
    bool causal;
    int64_t window;
    bool biased;
  };
  // Short sequences, one of a single token, and one of more queries than are taken at a time.
  const std::vector<int64_t> starts = {0, 5, 6, 6, 39, 300};
  const int64_t tokens = starts.back(), distances = 300;
  std::vector<int32_t> positions;
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    // With a gap, as padding inside a row leaves.
    for (int64_t i = 0; i < starts[s + 1] - starts[s]; ++i) {
      positions.push_back(static_cast<int32_t>(i + (i > 2)));
    }
  }
  DeviceBytes at(backend(), Pack(positions));
  int seed = 20;
  for (const Case c : {Case{2, 2, 8, false, 0, false}, Case{4, 2, 12, true, 0, false},
                       Case{6, 1, 4, true, 7, false}, Case{2, 2, 5, false, 3, true},
                       Case{3, 3, 16, false, 0, true}}) {
    const int64_t width = c.heads * c.head, key_width = c.key_heads * c.head;
    const Dense q = Random(tokens, width, ++seed), k = Random(tokens, key_width, ++seed),
                v = Random(tokens, key_width, ++seed),
                bias = Random(c.heads, 2 * distances - 1, ++seed);
    OnDevice dq(backend(), q), dk(backend(), k), dv(backend(), v), dbias(backend(), bias, 0);
    OnDevice out(backend(), Dense(tokens, width));
    ASSERT_TRUE(network()
                    .Attention({.q = dq.view(),
                                .k = dk.view(),
                                .v = dv.view(),
                                .out = out.view(),
                                .heads = c.heads,
                                .key_heads = c.key_heads,
                                .head = c.head,
                                .scale = 0.3f,
                                .causal = c.causal,
                                .window = c.window,
                                .positions = reinterpret_cast<const int32_t*>(at.data()),
                                .bias = c.biased ? dbias.data() : nullptr,
                                .distances = c.biased ? distances : 0,
                                .starts = starts})
                    .ok());
    Dense wanted(tokens, width);
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      for (int64_t i = starts[s]; i < starts[s + 1]; ++i) {
        for (int64_t h = 0; h < c.heads; ++h) {
          const int64_t kh = h / (c.heads / c.key_heads);
          std::vector<double> weight(starts[s + 1], 0.0);
          double total = 0;
          for (int64_t j = starts[s]; j < starts[s + 1]; ++j) {
            const int64_t apart = positions[j] - positions[i];
            if (c.causal && j > i) continue;
            if (c.window > 0 && std::abs(apart) >= c.window) continue;
            double score = 0;
            for (int64_t d = 0; d < c.head; ++d) {
              score += 0.3f * q(i, h * c.head + d) * k(j, kh * c.head + d);
            }
            if (c.biased) score += bias(h, apart + distances - 1);
            weight[j] = std::exp(score);
            total += weight[j];
          }
          for (int64_t j = starts[s]; j < starts[s + 1]; ++j) {
            for (int64_t d = 0; d < c.head; ++d) {
              wanted(i, h * c.head + d) += weight[j] / total * v(j, kh * c.head + d);
            }
          }
        }
      }
    }
    EXPECT_LT(LargestError(out.Fetch(), wanted), 5e-6) << c.heads << " heads";
  }
}

TEST_P(NetworkTest, PredictionsClassByClass) {
  const int64_t rows = 40, classes = 101;
  Dense logits = Random(rows, classes, 31, 4);
  logits(3, 7) = logits(3, 90) = 50;  // the first of equal ones
  logits(4, 0) = 80;                  // far above those of later blocks
  logits(5, 100) = 80;
  std::vector<int32_t> labels;
  for (int64_t i = 0; i < rows; ++i) labels.push_back(static_cast<int32_t>(i * 37 % classes));
  DeviceBytes device_labels(backend(), Pack(labels));
  for (const int64_t block : {1, 33, 101}) {
    DeviceBytes predictions(backend(), Pack(std::vector<Prediction>(rows)));
    OnDevice device(backend(), logits);
    for (int64_t first = 0; first < classes; first += block) {
      const int64_t count = std::min(block, classes - first);
      ASSERT_TRUE(network()
                      .Predict(device.view().Columns(first, count), first,
                               reinterpret_cast<const int32_t*>(device_labels.data()),
                               reinterpret_cast<Prediction*>(predictions.data()))
                      .ok());
    }
    const auto results = FetchValues<Prediction>(predictions);
    for (int64_t i = 0; i < rows; ++i) {
      const double* const row = logits.values.data() + i * classes;
      const double largest = *std::max_element(row, row + classes);
      double sum = 0;
      for (int64_t j = 0; j < classes; ++j) sum += std::exp(row[j] - largest);
      EXPECT_EQ(results[i].best, std::max_element(row, row + classes) - row);
      EXPECT_EQ(results[i].label, row[labels[i]]);
      const double loss = results[i].largest + std::log(results[i].sum) - results[i].label;
      EXPECT_NEAR(loss, largest + std::log(sum) - row[labels[i]], 2e-6 * (1 + std::abs(loss)));
    }
  }
}

TEST_P(NetworkTest, RowsAndMoments) {
  const Dense x = Random(700, 45, 41), y = Random(700, 530, 42);
  OnDevice dx(backend(), x), dy(backend(), y);
  const std::vector<int32_t> rows = {699, 0, 0, 5};
  DeviceBytes indexes(backend(), Pack(rows));
  OnDevice taken(backend(), Dense(4, 45));
  ASSERT_TRUE(network()
                  .Gather(dx.view(), reinterpret_cast<const int32_t*>(indexes.data()), taken.view())
                  .ok());
  const Dense fetched = taken.Fetch();
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 45; ++j) EXPECT_EQ(fetched(i, j), x(rows[i], j));
  }

  OnDevice difference(backend(), Dense(700, 45));
  ASSERT_TRUE(network().Subtract(dx.view(), dx.data(), difference.view()).ok());
  const Dense less = difference.Fetch();
  for (int64_t j = 0; j < 45; ++j) {
    EXPECT_EQ(less(600, j), static_cast<float>(x(600, j)) - static_cast<float>(x(0, j)));
  }

  // Added to what is there, twice.
  DeviceBytes sums(backend(), Pack(std::vector<double>(530, 1.0)));
  DeviceBytes squares(backend(), Pack(std::vector<double>(530, 2.0)));
  DeviceBytes cross(backend(), Pack(std::vector<double>(45 * 530, 3.0)));
  DeviceBytes own(backend(), Pack(std::vector<double>(530 * 530, 4.0)));
  const auto doubles = [](DeviceBytes& bytes) { return reinterpret_cast<double*>(bytes.data()); };
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(network().AddMoments(dy.view(), doubles(sums), doubles(squares)).ok());
    ASSERT_TRUE(network().AddGram(dx.view(), dy.view(), doubles(cross)).ok());
    ASSERT_TRUE(network().AddGram(dy.view(), dy.view(), doubles(own)).ok());
  }
  const auto found_sums = FetchValues<double>(sums), found_squares = FetchValues<double>(squares);
  const auto found_cross = FetchValues<double>(cross), found_own = FetchValues<double>(own);
  for (int64_t j = 0; j < 530; ++j) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < 700; ++i) sum += y(i, j), square += y(i, j) * y(i, j);
    EXPECT_NEAR(found_sums[j], 1 + 2 * sum, 1e-10);
    EXPECT_NEAR(found_squares[j], 2 + 2 * square, 1e-9);
    for (const int64_t a : {0, 17, 44}) {
      double product = 0;
      for (int64_t i = 0; i < 700; ++i) product += x(i, a) * y(i, j);
      EXPECT_NEAR(found_cross[a * 530 + j], 3 + 2 * product, 2e-3);
    }
    for (const int64_t a : {0, 511, 512, 529}) {
      double product = 0;
      for (int64_t i = 0; i < 700; ++i) product += y(i, a) * y(i, j);
      // The lower triangle alone.
      EXPECT_NEAR(found_own[a * 530 + j], j <= a ? 4 + 2 * product : 4.0, 2e-3) << a << " " << j;
    }
  }
}

TEST_P(NetworkTest, RefusesWhatDoesNotFit) {
  OnDevice a(backend(), Dense(3, 4)), b(backend(), Dense(4, 3));
  const auto internal = [](const absl::Status& status) {
    return status.code() == absl::StatusCode::kInternal;
  };
  EXPECT_TRUE(internal(network().Linear({.x = a.view(), .w = b.view(), .y = a.view()})));
  EXPECT_TRUE(internal(network().Gate(Activation::kSilu, a.view(), b.view())));
  EXPECT_TRUE(internal(network().Normalize({.x = a.view(), .weight = nullptr, .y = a.view()})));
  EXPECT_TRUE(internal(network().Rotate({.x = a.view(), .head = 3, .pairs = 1})));
  const std::vector<int64_t> starts = {0, 2};
  EXPECT_TRUE(internal(network().Attention({.q = a.view(),
                                            .k = a.view(),
                                            .v = a.view(),
                                            .out = a.view(),
                                            .heads = 1,
                                            .key_heads = 1,
                                            .head = 4,
                                            .starts = starts})));
  EXPECT_TRUE(internal(network().Gather(a.view(), nullptr, b.view())));
  EXPECT_TRUE(internal(network().Subtract(a.view(), a.data(), b.view())));
  EXPECT_TRUE(internal(network().AddGram(a.view(), b.view(), nullptr)));
}

}  // namespace
}  // namespace pewter::kernels
