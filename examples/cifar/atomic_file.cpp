#include "atomic_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace cifar {

namespace {

/// A file descriptor of one's own, for what streams do not offer: fsync.
class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags) : path_(path), value_(open(path.c_str(), flags, 0666)) {
    check(value_ >= 0);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (value_ >= 0) {
      close(value_);
    }
  }

  void write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(value_, bytes.data(), bytes.size());
      if (written >= 0) {
        bytes.remove_prefix(static_cast<std::size_t>(written));
      } else {
        check(errno == EINTR);
      }
    }
  }

  void sync() {
    check(fsync(value_) == 0 || errno == EINVAL);  // EINVAL: a device, which has nothing to sync
  }

  void close_checked() { check(close(std::exchange(value_, -1)) == 0); }

 private:
  void check(bool good) const {
    if (!good) {
      fail_to_write(path_, std::strerror(errno));
    }
  }

  std::filesystem::path path_;
  int value_;
};

}  // namespace

void fail_to_write(const std::filesystem::path& path, std::string_view reason) {
  throw std::runtime_error(
      fmt::format("{}: cannot be written: {}; choose another folder with --output, or free space on its disk",
                  path.string(), reason));
}

void sync_file(const std::filesystem::path& path) { Descriptor(path, O_RDONLY | O_CLOEXEC).sync(); }

void replace_file(const std::filesystem::path& path, std::string_view bytes) {
  const std::filesystem::path temporary = path.string() + ".tmp";
  Descriptor file(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC);
  file.write(bytes);
  file.sync();
  file.close_checked();
  std::error_code error;
  std::filesystem::rename(temporary, path, error);
  if (error) {
    fail_to_write(path, error.message());
  }
  sync_file(path.has_parent_path() ? path.parent_path() : ".");  // The rename itself.
}

}  // namespace cifar
