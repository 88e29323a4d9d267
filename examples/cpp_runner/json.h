// As much JSON as the metadata of a package and a tokenizer.json need.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

class Json {
 public:
  // Throws std::runtime_error where the text is not JSON.
  static Json parse(const std::string& text);

  // These throw std::runtime_error if the value is of another kind or the key is missing.
  const Json& operator[](const std::string& key) const;
  const std::vector<Json>& items() const;
  const std::map<std::string, Json>& members() const;
  const std::string& text() const;
  int64_t integer() const;
  std::vector<int64_t> integers() const;

  // These ask, and do not throw.
  bool has(const std::string& key) const { return members_.count(key) > 0; }
  bool null() const { return kind_ == Kind::null; }
  bool is_false() const { return kind_ == Kind::boolean && number_ == 0; }
  bool is_text() const { return kind_ == Kind::string; }
  bool is_text(const std::string& text) const { return is_text() && text_ == text; }

 private:
  enum class Kind { null, boolean, number, string, array, object };
  Kind kind_ = Kind::null;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;

  friend class Parser;
};

// A character as UTF-8.
std::string utf8(uint32_t c);
