// pewter completion: completions for a shell, on standard output.
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/completion.h"
#include "client/exit_code.h"

namespace pewter::client {

CommandBody DeclareCompletion(CLI::App& app) {
  auto shell = std::make_shared<std::string>();
  app.add_option("shell", *shell, "Shell")->required()->type_name("bash|zsh|fish");
  app.footer(
      "Examples:\n"
      "  bash: echo 'eval \"$(pewter completion bash)\"' >> ~/.bashrc\n"
      "  zsh:  pewter completion zsh > \"${fpath[1]}/_pewter\"\n"
      "  fish: pewter completion fish > ~/.config/fish/completions/pewter.fish");
  const CLI::App* root = app.get_parent();
  return [shell, root](Output& out) -> absl::StatusOr<int> {
    if (*shell == "bash") {
      out.Text(BashCompletion(*root));
    } else if (*shell == "zsh") {
      out.Text(ZshCompletion(*root));
    } else if (*shell == "fish") {
      out.Text(FishCompletion(*root));
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("no completions for ", *shell, "; there are bash, zsh and fish"));
    }
    return kExitDone;
  };
}

}  // namespace pewter::client
