// What a merge cannot do without, and nothing else: reads every input file once with pread through
// 1 MiB buffers and writes as many bytes as the merged model has, then fsync and rename, in one
// process.
//
//   pewter_plain_io OUT BYTES THREADS INPUT...
//
// Chunks are read in file order; each chunk of output follows the inputs' chunks that a merge would
// read for it, and holds bytes that were just read.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kChunk = 1 << 20;

[[noreturn]] void Fail(const std::string& what) {
  std::perror(what.c_str());
  std::exit(1);
}

struct Input {
  std::string path;
  int file = -1;
  int64_t bytes = 0;
};

struct Chunk {
  const Input* input = nullptr;
  int64_t offset = 0;
};

// All chunks of all inputs, ordered by their place in their own file, from 0 to 1: the order in
// which a merge of equally shaped models comes by them.
std::vector<Chunk> Interleave(const std::vector<Input>& inputs) {
  std::vector<Chunk> chunks;
  for (const Input& input : inputs) {
    for (int64_t at = 0; at < input.bytes; at += kChunk) chunks.push_back({&input, at});
  }
  std::stable_sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) {
    return static_cast<double>(a.offset) * b.input->bytes <
           static_cast<double>(b.offset) * a.input->bytes;
  });
  return chunks;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s OUT BYTES THREADS INPUT...\n", argv[0]);
    return 2;
  }
  const std::string out = argv[1], temporary = out + ".tmp";
  const int64_t bytes = std::atoll(argv[2]);
  const int thread_count = std::atoi(argv[3]);
  if (bytes <= 0 || thread_count <= 0) {
    std::fprintf(stderr, "BYTES and THREADS must be positive numbers\n");
    return 2;
  }

  std::vector<Input> inputs;
  for (int i = 4; i < argc; ++i) {
    Input input{.path = argv[i], .file = open(argv[i], O_RDONLY | O_CLOEXEC)};
    struct stat status {};
    if (input.file < 0 || fstat(input.file, &status) != 0) Fail(input.path);
    input.bytes = status.st_size;
    inputs.push_back(input);
  }
  const int output = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (output < 0) Fail(temporary);

  const std::vector<Chunk> chunks = Interleave(inputs);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t output_chunks = (bytes + kChunk - 1) / kChunk;
  std::atomic<int64_t> next = 0;
  const auto work = [&] {
    std::vector<char> buffer(kChunk);
    for (int64_t i = next++; i < count; i = next++) {
      const Chunk& chunk = chunks[i];
      const int64_t size = std::min(kChunk, chunk.input->bytes - chunk.offset);
      for (int64_t done = 0; done < size;) {
        const ssize_t got =
            pread(chunk.input->file, buffer.data() + done, size - done, chunk.offset + done);
        if (got <= 0) Fail(chunk.input->path);
        done += got;
      }
      for (int64_t o = i * output_chunks / count; o < (i + 1) * output_chunks / count; ++o) {
        const int64_t offset = o * kChunk;
        const int64_t length = std::min(kChunk, bytes - offset);
        for (int64_t done = 0; done < length;) {
          const ssize_t put = pwrite(output, buffer.data() + done, length - done, offset + done);
          if (put <= 0) Fail(temporary);
          done += put;
        }
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < thread_count; ++i) threads.emplace_back(work);
  }
  if (fsync(output) != 0 || close(output) != 0) Fail(temporary);
  if (std::rename(temporary.c_str(), out.c_str()) != 0) Fail(out);
  const std::filesystem::path parent = std::filesystem::absolute(out).parent_path();
  const int folder = open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0 || fsync(folder) != 0) Fail(parent);
  for (const Input& input : inputs) close(input.file);
  close(folder);
  return 0;
}
